"""What watches: method-blind Lightning callbacks."""

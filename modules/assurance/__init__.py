"""What a result is worth: statistics over runs and tasks. numpy only, no Lightning inside."""

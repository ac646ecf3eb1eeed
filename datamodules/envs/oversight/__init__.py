"""Small worlds in which a policy can escape oversight, harm bystanders or share badly; each counts what it hides."""

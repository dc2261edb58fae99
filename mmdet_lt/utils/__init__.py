"""Small helpers shared by the sub-packages."""

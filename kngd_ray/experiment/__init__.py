"""What each command does, between the thin command line and the packages that do the work."""

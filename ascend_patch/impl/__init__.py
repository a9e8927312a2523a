"""What patches put in place of a host's own methods."""

"""What starts processes: `heap` for the scripts, templates for clusters."""

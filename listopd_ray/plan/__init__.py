"""What a configuration takes in memory and time, before anything starts."""

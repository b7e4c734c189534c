"""What several commands use. Nothing here is a command."""

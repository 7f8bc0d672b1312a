"""What outlives an exchange."""

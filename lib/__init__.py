"""Rooms that would be the same in a repository about something else: nothing here imports a file of the top level."""

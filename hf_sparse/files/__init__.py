"""Folders and files that survive a kill."""

"""Tests of one budget over depth and width."""

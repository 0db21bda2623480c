"""Find the best reference clips of one speaker in recordings of any length."""

from revox.find.errors import FindError
from revox.find.find import Findings, FindRequest, FoundSpeaker, find_references

__all__ = ["FindError", "FindRequest", "Findings", "FoundSpeaker", "find_references"]

"""Models in few bytes: entropy coders, and the container `.lowbit` that gives back every file bit for bit."""

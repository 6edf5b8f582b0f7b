"""Find faces in videos: their directions, and pictures of their mouths."""

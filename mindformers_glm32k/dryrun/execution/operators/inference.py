"""What prediction with a cache adds."""

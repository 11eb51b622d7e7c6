"""Is it fast, and does it survive?"""

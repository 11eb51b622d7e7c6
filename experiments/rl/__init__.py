"""Does QIPO work?"""

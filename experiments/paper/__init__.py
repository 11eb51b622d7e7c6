"""Does the method do what the paper says?"""

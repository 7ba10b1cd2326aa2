"""Messages of other formats into turns and back, without loss.

Nothing here calls a daemon or a provider, counts a token, or guesses at what a message means.
"""

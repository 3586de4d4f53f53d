"""What a token has to be."""

MIN_TOKEN_CHARACTERS = 16
"""A shorter token could be guessed; nothing else slows guessing down."""
TOO_SHORT = (
    f"{MIN_TOKEN_CHARACTERS} characters or more; to make one: "
    "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
)

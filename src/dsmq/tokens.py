"""Requirements on tokens."""

MIN_TOKEN_CHARACTERS = 16
"""A shorter token could be guessed, because guesses are not throttled."""
MAX_TOKEN_CHARACTERS = 2048
"""A longer token might not fit into a request before authentication (`max_unauthenticated_bytes`)."""
TOO_SHORT = (
    f"{MIN_TOKEN_CHARACTERS} characters or more; to make one: "
    "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
)


def check_token(token: str) -> str:
    """Return the token if it meets the requirements. Raises ValueError."""
    if token.split() != [token] or not token.isascii():
        raise ValueError("should be a token: ASCII, without spaces")
    if not token.strip("*"):
        raise ValueError("should be the token itself, not its mask")
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ValueError(f"should have {TOO_SHORT}")
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise ValueError(f"should have at most {MAX_TOKEN_CHARACTERS} characters")
    return token

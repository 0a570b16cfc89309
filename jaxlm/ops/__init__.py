"""Operations on arrays: no parameters, no configuration."""

"""One layer, one op or one value alone, so that an error stays where it was made."""

"""Where the README's figures come from: one command each, every peer measured in the same run."""

"""The generators import peers that are not installed here."""

collect_ignore_glob = ["make/*"]

"""The plugins here are other people's code: installed by the tests, not collected."""

collect_ignore = ["polynomial", "clash", "extreme"]

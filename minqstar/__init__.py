"""minqstar: a language model is a Q-function (arXiv 2404.12358)."""

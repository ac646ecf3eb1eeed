"""Language-model core: load, adapt, train, generate, score, export. Import the submodule you need."""

// Preloaded by the tests of the backend: nothing to prepare.

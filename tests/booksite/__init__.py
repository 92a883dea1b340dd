"""Tools for the tests of the book: the files of a site, a browser, the notebooks."""

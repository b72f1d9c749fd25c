"""Models, projects, servers and reference implementations shared by the tests."""

"""What the tests of the models share."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs real networks; part of every full run")

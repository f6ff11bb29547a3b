"""Tests of the guard in real sandboxes, without a site: each makes its own network, agent, controller and servers."""

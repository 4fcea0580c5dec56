"""The HTTP endpoint: `ragturbo serve`, or the same application on Ray Serve. Needs the extra "serve"."""

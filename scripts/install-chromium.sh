#!/bin/sh
# Installs Chromium from the distribution's packages, for the test that drives the report in a real browser.
set -eu
if ! command -v apt-get >/dev/null; then
    echo "The tests need Chromium on PATH (chromium, chromium-browser or google-chrome); install it and run again." >&2
    exit 1
fi
run=""
if [ "$(id -u)" -ne 0 ]; then run="sudo"; fi
$run apt-get update -qq
$run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null

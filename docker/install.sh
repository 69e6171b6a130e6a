# Install a lock file's packages into /opt/vgg without what no program loads: static libraries, C++ headers, their tests.
set -eu
export PIP_CACHE_DIR=/cache/pip UV_CACHE_DIR=/cache/uv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
if [ -s /run/ca.pem ]; then export PIP_CERT=/run/ca.pem SSL_CERT_FILE=/run/ca.pem; fi
python3.11 -m venv /tmp/uv
/tmp/uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
/tmp/uv/bin/uv pip install --quiet --python /opt/vgg/bin/python --require-hashes -r "$1"
cd /opt/vgg/lib/python3.11/site-packages
find . -name '*.a' -delete
rm -rf torch/include torch/share /tmp/uv*
find . -type d -name tests -prune -exec rm -rf {} +

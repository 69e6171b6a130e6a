# Packages of a lock file into /opt/vgg, less what no program loads: static libraries, C++ headers, command-line tools.
set -eu
export UV_CACHE_DIR=/uv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
if [ -s /run/ca.pem ]; then export SSL_CERT_FILE=/run/ca.pem; fi
/opt/uv/bin/uv pip install --quiet --python /opt/vgg/bin/python --require-hashes -r "$1"
cd /opt/vgg/lib/python3.11/site-packages
find . -name '*.a' -delete
rm -rf torch/include torch/bin torch/share

# mmrag serve on the CPU. For a GPU, leave out the line that names PyTorch's CPU wheels.
#
#     docker build -t mmrag .
#     docker run -p 127.0.0.1:8321:8321 -v mmrag-data:/data -e MMRAG_API_KEYS=... mmrag

FROM python:3.12-slim AS build
COPY . /src
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && /venv/bin/pip install --no-cache-dir "/src[serve,mcp,ocr]"

FROM python:3.12-slim
# OpenCV, which recognises text in scans, needs these two libraries.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 mmrag \
    && install -d -o mmrag /data
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER mmrag
WORKDIR /data
VOLUME /data
EXPOSE 8321
HEALTHCHECK --start-period=60s --interval=10s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8321/ready')"]
# SIGTERM stops it gracefully. An address other than loopback needs MMRAG_API_KEYS.
ENTRYPOINT ["mmrag"]
CMD ["serve", "--host", "0.0.0.0", "--collection", "/data/library"]

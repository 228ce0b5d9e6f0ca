# docker build -t ryzanstein . ; docker run -p 8000:8000 -v ryzanstein:/cache ryzanstein
# The model is downloaded at the first start and kept in /cache.
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/ryzanstein
# TORCH_INDEX=https://pypi.org/simple has the CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/ryzanstein/bin/pip install --no-cache-dir --index-url ${TORCH_INDEX} 'torch>=2.11,<2.14'
COPY pyproject.toml CMakeLists.txt README.md ./
COPY engine engine
COPY kernels kernels
COPY server server
RUN /opt/ryzanstein/bin/pip install --no-cache-dir .

FROM python:3.12-slim-bookworm
COPY --from=build /opt/ryzanstein /opt/ryzanstein
RUN useradd --system --uid 10001 --create-home ryzanstein && install -d -o ryzanstein /cache
USER ryzanstein
ENV PATH=/opt/ryzanstein/bin:$PATH RYZANSTEIN_CACHE=/cache
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live')"]
ENTRYPOINT ["ryzanstein"]
# Keys come from RYZANSTEIN_API_KEY or a tenants file; without any, whoever reaches the port is served.
CMD ["serve", "--host", "0.0.0.0"]

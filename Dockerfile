# syntax=docker/dockerfile:1

# One image with the daemon and its command line.
#   docker build -t sessiond .
#   docker run --read-only --tmpfs /tmp -v sessiond:/var/lib/sessiond -p 7443:7443 sessiond
# It listens on every interface of the container, without authentication: publish the port only where that is wanted.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/sessiond \
 && /opt/sessiond/bin/pip install --no-cache-dir --compile . \
 && /opt/sessiond/bin/pip uninstall --yes pip \
 && /opt/sessiond/bin/sessiond version

FROM python:${PYTHON}-slim
# The same numbers as in the Helm chart, so that a volume written by one is readable by the other.
RUN groupadd --system --gid 7443 sessiond \
 && useradd --system --uid 7443 --gid 7443 --home-dir /var/lib/sessiond --shell /usr/sbin/nologin sessiond \
 && install --directory --owner=sessiond --group=sessiond --mode=0750 /var/lib/sessiond
COPY --from=build /opt/sessiond /opt/sessiond
# Nothing but /var/lib/sessiond is ever written, so the root file system may be read-only.
ENV PATH=/opt/sessiond/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SESSIOND_DATA_DIR=/var/lib/sessiond \
    SESSIOND_LISTEN=0.0.0.0:7443
USER 7443:7443
WORKDIR /var/lib/sessiond
VOLUME /var/lib/sessiond
EXPOSE 7443
# SIGTERM drains; give it as long as drain_grace_ms allows (docker stop --time).
STOPSIGNAL SIGTERM
ENTRYPOINT ["sessiond"]
CMD ["serve"]

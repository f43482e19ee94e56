# syntax=docker/dockerfile:1

FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=devel
ARG COMMIT=
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.versionText=${VERSION} -X main.commitText=${COMMIT}" -o /ollama-cacheproxy ./cmd/ollama-cacheproxy

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /ollama-cacheproxy /ollama-cacheproxy
USER 65532:65532
EXPOSE 11435
# Inside a container the proxy has to listen beyond loopback. Publish the port to 127.0.0.1, or
# mount a file of API keys and set OLLAMA_CACHEPROXY_API_KEYS_FILE.
ENV OLLAMA_CACHEPROXY_LISTEN=0.0.0.0:11435 \
    OLLAMA_CACHEPROXY_UPSTREAM=http://host.docker.internal:11434
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["/ollama-cacheproxy", "health"]
ENTRYPOINT ["/ollama-cacheproxy"]

# A formula for a tap. There is no release yet, so it builds the branch main:
#   brew install --HEAD TAP/ollama-cacheproxy
class OllamaCacheproxy < Formula
  desc "Transparent HTTP proxy in front of Ollama that keeps models loaded"
  homepage "https://github.com/ollama-cacheproxy/ollama-cacheproxy"
  license "MIT"
  head "https://github.com/ollama-cacheproxy/ollama-cacheproxy.git", branch: "main"

  depends_on "go" => :build

  def install
    ldflags = "-s -w -X main.versionText=#{version}"
    system "go", "build", *std_go_args(ldflags: ldflags), "./cmd/ollama-cacheproxy"
    generate_completions_from_executable(bin/"ollama-cacheproxy", "completion")
    (man1/"ollama-cacheproxy.1").write Utils.safe_popen_read(bin/"ollama-cacheproxy", "man")
  end

  service do
    run [opt_bin/"ollama-cacheproxy", "serve"]
    keep_alive true
    log_path var/"log/ollama-cacheproxy.log"
    error_log_path var/"log/ollama-cacheproxy.log"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/ollama-cacheproxy --version")
    settings = "--listen 127.0.0.1:#{free_port} --upstream sim:?model=test"
    assert_match "the settings are right", shell_output("#{bin}/ollama-cacheproxy --check #{settings}")
  end
end

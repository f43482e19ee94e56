# The part of Homebrew that the formula needs: it runs install, the service and the test, in a
# folder. There is no Go here, so the program is not built, but the command that builds it is
# printed.
#   ruby homebrew.rb FORMULA FOLDER, with PROGRAM, a program that was built
require "fileutils"
require "json"
require "pathname"
require "socket"

FOLDER = Pathname(ARGV.fetch(1))

module Utils
  def self.safe_popen_read(*command)
    IO.popen(command.map(&:to_s), &:read).tap { raise "#{command} failed" unless $?.success? }
  end
end

class Pathname
  remove_method :write
  def write(text) # like Homebrew's, which makes the folder
    dirname.mkpath
    File.write(to_s, text)
  end
end

class Service
  attr_reader :said
  def initialize(formula, &block)
    @formula, @said = formula, {}
    instance_eval(&block)
  end
  %i[run keep_alive log_path error_log_path].each { |name| define_method(name) { |value| @said[name] = value } }
  def opt_bin = @formula.bin
  def var = FOLDER/"var"
end

class Formula
  class << self
    attr_reader :said, :service_block, :test_block
    def inherited(formula) = @formula = formula
    def formula = @formula
    %i[desc homepage license head depends_on].each do |name|
      define_method(name) { |*values, **more| (@said ||= {})[name] = [values, more] }
    end
    def service(&block) = @service_block = block
    def test(&block) = @test_block = block
  end

  def version = ENV.fetch("VERSION")
  def bin = FOLDER/"bin"
  def man1 = FOLDER/"share/man/man1"
  def std_go_args(ldflags:) = ["-trimpath", "-o=#{bin}/ollama-cacheproxy", "-ldflags=#{ldflags}"]

  def system(*command)
    puts "RUN #{JSON.generate(command.map(&:to_s))}"
    bin.mkpath
    FileUtils.cp(ENV.fetch("PROGRAM"), bin/"ollama-cacheproxy")
  end

  def generate_completions_from_executable(*command)
    %w[bash zsh fish].each do |shell|
      (FOLDER/"completions"/shell).write Utils.safe_popen_read(*command, shell)
    end
  end

  def free_port = TCPServer.open("127.0.0.1", 0) { |server| server.addr[1] }
  def shell_output(command) = `#{command}`.tap { raise "#{command} failed" unless $?.success? }
  def assert_match(what, text) = (raise "#{what.inspect} is not in #{text.inspect}" unless text.match?(what))
end

load ARGV.fetch(0)
formula = Formula.formula
%i[desc homepage license head].each { |name| raise "no #{name}" unless formula.said[name] }
# Two of the rules of "brew audit".
raise "desc is too long" if formula.said[:desc][0][0].size > 80
raise "desc begins with an article" if formula.said[:desc][0][0].match?(/\A(an?|the) /i)
made = formula.new
made.install
raise "no man page" unless (FOLDER/"share/man/man1/ollama-cacheproxy.1").read.start_with?(".TH")
service = Service.new(made, &formula.service_block)
raise "the service runs nothing" unless service.said[:run][0].executable?
made.instance_eval(&formula.test_block)

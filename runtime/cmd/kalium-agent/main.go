// Command kalium-agent is the daemon of a node; package agent says what it does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"kalium.dev/kalium/runtime/internal/agent"
)

const usage = `usage: kalium-agent [--config FILE]
       kalium-agent status [--config FILE] [--output text|json]
       kalium-agent --version

Without a verb it serves until SIGTERM or SIGINT; SIGHUP opens its logs again.
"status" asks the running agent: exit code 0 when it is connected to a controller, 1 when not, 3 when none runs.

`

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(arguments []string, stdout, stderr io.Writer) int {
	verb := "serve"
	if len(arguments) > 0 && arguments[0] == "status" {
		verb, arguments = "status", arguments[1:]
	}
	flags := flag.NewFlagSet("kalium-agent", flag.ContinueOnError)
	flags.SetOutput(stderr)
	config := flags.String("config", agent.DefaultConfigPath, "the configuration `FILE`")
	showVersion := false
	output := "text"
	if verb == "serve" {
		flags.BoolVar(&showVersion, "version", false, "print the version and exit")
	} else {
		flags.StringVar(&output, "output", output, "`text` for people or json for programs")
	}
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	for _, argument := range arguments {
		if argument == "--help" || argument == "-h" || argument == "-help" {
			flags.SetOutput(stdout)
		}
	}
	switch err := flags.Parse(arguments); {
	case errors.Is(err, flag.ErrHelp):
		return agent.ExitDone
	case err != nil: // said already, with the usage
		return agent.ExitUsage
	case flags.NArg() > 0 || output != "text" && output != "json":
		fmt.Fprintf(stderr, "error[agent.usage]: cannot run: an argument that is not known\nnext: see `kalium-agent --help`\n")
		return agent.ExitUsage
	case showVersion:
		fmt.Fprintln(stdout, "kalium-agent", agent.Version())
		return agent.ExitDone
	}
	if err := act(verb, *config, output == "json", stdout, stderr); err != nil {
		fmt.Fprintln(stderr, err)
		var known *agent.Error
		if errors.As(err, &known) {
			return known.Exit
		}
		return agent.ExitEnvironment
	}
	return agent.ExitDone
}

func act(verb, path string, asJSON bool, stdout, stderr io.Writer) error {
	config, err := agent.LoadConfig(path)
	if err != nil {
		return err
	}
	if verb == "status" {
		return agent.Status(config, stdout, asJSON)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	reopen := make(chan os.Signal, 1)
	signal.Notify(reopen, syscall.SIGHUP)
	defer signal.Stop(reopen)
	return agent.Serve(ctx, config, stderr, reopen)
}

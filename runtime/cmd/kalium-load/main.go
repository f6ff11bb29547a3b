// Command kalium-load drives controllers and agents for the benchmarks (experiments/bench_controller). It prints one JSON
// object; an error is one line on standard error and exit code 1.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"time"

	"kalium.dev/kalium/runtime/internal/load"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "kalium-load: %v\n", err)
		os.Exit(1)
	}
}

const usage = "kalium-load controller|edges|relay|soak -help"

func run(arguments []string) error {
	if len(arguments) == 0 {
		return errors.New(usage)
	}
	flags := flag.NewFlagSet("kalium-load "+arguments[0], flag.ContinueOnError)
	var target load.Target
	flags.StringVar(&target.Address, "address", "127.0.0.1:5000", "of the controller, or of the echo")
	flags.StringVar(&target.Name, "name", "controller", "that its certificate has to have")
	flags.StringVar(&target.CA, "ca", "", "PEM `file`; without it the connection is in clear")
	flags.StringVar(&target.Cert, "cert", "", "PEM `file`")
	flags.StringVar(&target.Key, "key", "", "PEM `file`")
	node := flags.String("node", "load", "as which agent to ask")
	socket := flags.String("socket", "", "guard `socket` of an agent, or where to listen as a relay")
	fronts := flags.String("front-container", "load-front", "registered for the front")
	leaves := flags.String("leaf-container", "load-leaf", "registered for the leaf")
	var plan load.Plan
	flags.StringVar(&plan.App, "app", "bench", "")
	flags.StringVar(&plan.Front, "front", "front", "function that invokes")
	flags.StringVar(&plan.Leaf, "leaf", "leaf", "function that is invoked")
	flags.IntVar(&plan.Version, "version", 1, "of the policy")
	flags.IntVar(&plan.Edges, "edges", 8, "invokes in a call")
	flags.BoolVar(&plan.KeepOpen, "keep-open", false, "leaves end with their call")
	flags.IntVar(&plan.Lanes, "lanes", 1, "calls under way at a time")
	flags.Float64Var(&plan.Seconds, "seconds", 5, "of measuring")
	flags.IntVar(&plan.Calls, "calls", 0, "measure at most so many; 0: no bound")
	flags.IntVar(&plan.WarmUp, "warm-up", 0, "calls before measuring")
	flags.BoolVar(&plan.Floor, "floor", false, "an echo answers: no hello and no registration")
	var long load.SoakPlan
	flags.IntVar(&long.Calls, "soak-calls", 10000, "calls under way at a time")
	flags.Float64Var(&long.Rate, "rate", 2000, "questions a second")
	flags.Uint64Var(&long.Seed, "seed", 1, "")
	flags.DurationVar(&long.TokenLife, "token-life", 30*time.Second, "`time` for which the controllers keep a token")
	flags.StringVar(&long.Denials, "denials", "denials.tsv", "`file` of the verdicts that were told")
	if err := flags.Parse(arguments[1:]); err != nil {
		return err
	}
	var result *load.Result
	var err error
	switch arguments[0] {
	case "controller":
		result, err = load.Controller(target, *node, plan)
	case "edges":
		result, err = load.Edges(*socket, [2]string{*fronts, *leaves}, plan)
	case "relay":
		listener, err := net.Listen("unix", *socket)
		if err != nil {
			return err
		}
		fmt.Println("listening")
		return load.Relay(listener, target)
	case "soak":
		long.Folders, long.Seconds = flags.Args(), plan.Seconds
		soaked, err := load.Soak(long, func(s load.Soaked) { _ = json.NewEncoder(os.Stdout).Encode(s) })
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(soaked)
	default:
		return errors.New(usage)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

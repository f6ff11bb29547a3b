package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"time"
)

// Status asks the agent that runs with config, and writes what it says for people, or as one JSON object. The error is
// an *Error; it says no when the agent has no connection to the controller.
func Status(config *Config, out io.Writer, asJSON bool) error {
	answer, err := askStatus(config.RegisterSocket)
	if err != nil {
		return environment("agent.unreachable", "cannot ask the agent at "+config.RegisterSocket,
			"start it (`supervisorctl start kalium-agent`), and ask as root", "%v", err)
	}
	if asJSON {
		err = json.NewEncoder(out).Encode(answer)
	} else {
		connected := "no"
		if *answer.Controller {
			connected = "yes"
		}
		_, err = fmt.Fprintf(out, "controller: %s\ninstances: %d\n", connected, *answer.Instances)
		for _, app := range slices.Sorted(maps.Keys(*answer.Policies)) {
			if err == nil {
				_, err = fmt.Fprintf(out, "policy %s: version %d\n", app, (*answer.Policies)[app])
			}
		}
	}
	if err != nil {
		return environment("agent.output", "cannot write the status", "check where standard output goes", "%v", err)
	}
	if !*answer.Controller {
		return &Error{
			Code: "agent.controller_away", Attempted: "cannot call the agent well", Found: "it has no connection to the controller at " + config.Controllers[0].Address,
			Next: "see why with `supervisorctl status kalium-controller` and in the agent's log", Exit: ExitNo,
		}
	}
	return nil
}

func askStatus(socket string) (*result, error) {
	conn, err := net.DialTimeout("unix", socket, statusTimeout)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(statusTimeout)); err != nil {
		return nil, err
	}
	if _, err := conn.Write([]byte(`{"op":"status"}` + "\n")); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(io.LimitReader(conn, versionsBytesMax)).ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	answer := &result{}
	if err := json.Unmarshal(line, answer); err != nil {
		return nil, err
	}
	if !answer.OK || answer.Controller == nil || answer.Policies == nil || answer.Instances == nil {
		return nil, errors.New("the answer is no status")
	}
	return answer, nil
}

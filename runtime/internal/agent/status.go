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
	"strings"
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
		_, err = io.WriteString(out, answer.text())
	}
	if err != nil {
		return environment("agent.output", "cannot write the status", "check where standard output goes", "%v", err)
	}
	if !*answer.Controller {
		var addresses []string
		for _, controller := range config.Controllers {
			addresses = append(addresses, controller.Address)
		}
		return &Error{
			Code: "agent.controller_away", Attempted: "cannot call the agent well",
			Found: "it has no connection to a controller at " + strings.Join(addresses, " or "),
			Next:  "see why with `kalium controller status` where they run, and in the agent's log", Exit: ExitNo,
		}
	}
	return nil
}

// text is a status for people.
func (r *result) text() string {
	var text strings.Builder
	for _, controller := range *r.Controllers {
		state := "not connected"
		if controller.Connected {
			state = "connected"
		}
		fmt.Fprintf(&text, "controller %s at %s: %s\n", controller.Name, controller.Address, state)
	}
	for _, app := range slices.Sorted(maps.Keys(*r.Policies)) {
		fmt.Fprintf(&text, "policy %s: version %d\n", app, (*r.Policies)[app])
	}
	for _, instance := range *r.Instances {
		state := "no guard"
		if instance.Mode != modeNone {
			state = fmt.Sprintf("%s by version %d", instance.Mode, instance.Version)
		}
		fmt.Fprintf(&text, "instance %s of %s/%s: %s\n", instance.Container, instance.App, instance.Function, state)
	}
	return text.String()
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
	if !answer.OK || answer.Controller == nil || answer.Controllers == nil || answer.Policies == nil || answer.Instances == nil {
		return nil, errors.New("the answer is no status")
	}
	return answer, nil
}

package agent

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// Codes of the register socket's answers, beside the reasons of a controller's refusal.
const (
	codeBadRequest   = "bad_request"
	codeUnknownApp   = "unknown_app"
	codeInUse        = "already_registered"
	codeTooMany      = "too_many_instances"
	codeUnregistered = "unregistered_meanwhile"
)

// request is one line of the register socket.
type request struct {
	Op        string `json:"op"`
	Container string `json:"container"`
	App       string `json:"app"`
	Function  string `json:"function"`
	Image     string `json:"image"`
}

// result answers it. The fields of a status and of a list are there only in their answers.
type result struct {
	OK          bool                `json:"ok"`
	Error       string              `json:"error,omitempty"`
	Detail      string              `json:"detail,omitempty"`
	Controller  *bool               `json:"controller,omitempty"` // one is connected
	Controllers *[]controllerStatus `json:"controllers,omitempty"`
	Policies    *map[string]int     `json:"policies,omitempty"`
	Instances   *[]instanceStatus   `json:"instances,omitempty"`
	Containers  *[]string           `json:"containers,omitempty"`
}

// controllerStatus is one of the configured controllers, in the order of the configuration.
type controllerStatus struct {
	Address   string `json:"address"`
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
}

// instanceStatus is one instance that the controller has acknowledged, with the mode in force in it.
type instanceStatus struct {
	Container string `json:"container"`
	App       string `json:"app"`
	Function  string `json:"function"`
	Mode      string `json:"mode"`
	Version   int    `json:"version"`
}

func refusal(code, detail string) result {
	return result{Error: code, Detail: policy.Printable(detail, logTextMax)}
}

// instance is one registration.
type instance struct {
	container, app, function, image string
	acknowledged                    bool   // by the controller; before that no guard is welcomed
	guard                           *guard // nil while none is connected
}

func (i *instance) identity() frame.Identity {
	return frame.Identity{Instance: i.container, App: i.app, Function: i.function}
}

func (i *instance) frame() *frame.Register {
	return &frame.Register{Instance: i.container, App: i.app, Function: i.function, Image: i.image}
}

// serveRegister answers the lines of one connection until it ends, is idle for too long, or sends a line beyond the
// bound.
func (a *Agent) serveRegister(conn *net.UnixConn) {
	defer conn.Close()
	lines := bufio.NewReaderSize(conn, registerLineMax)
	for {
		if err := conn.SetReadDeadline(time.Now().Add(registerIdle)); err != nil {
			return
		}
		line, err := lines.ReadSlice('\n')
		if err != nil {
			if !errors.Is(err, io.EOF) || len(line) > 0 {
				a.log.Warn(eventRegisterClosed, keyError, err)
			}
			return
		}
		answer, err := json.Marshal(a.handle(line))
		if err == nil {
			err = conn.SetWriteDeadline(time.Now().Add(registerWriteLimit))
		}
		if err == nil {
			_, err = conn.Write(append(answer, '\n'))
		}
		if err != nil {
			a.log.Warn(eventRegisterClosed, keyError, err)
			return
		}
	}
}

func (a *Agent) handle(line []byte) result {
	var r request
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&r); err != nil {
		return refusal(codeBadRequest, "the line is not the JSON object that is expected: "+err.Error())
	}
	if _, err := decoder.Token(); err != io.EOF {
		return refusal(codeBadRequest, "more than one JSON object in the line")
	}
	switch r.Op {
	case "register":
		return a.register(&instance{container: r.Container, app: r.App, function: r.Function, image: r.Image})
	case "unregister":
		if !isName(r.Container) || r.App+r.Function+r.Image != "" {
			return refusal(codeBadRequest, "unregister takes a container and nothing else")
		}
		a.unregister(r.Container)
		return result{OK: true}
	case "status":
		if r.Container+r.App+r.Function+r.Image != "" {
			return refusal(codeBadRequest, "status takes no fields")
		}
		return a.status()
	case "list":
		if r.Container+r.App+r.Function+r.Image != "" {
			return refusal(codeBadRequest, "list takes no fields")
		}
		return a.list()
	default:
		return refusal(codeBadRequest, "op is not register, unregister, list or status")
	}
}

func isName(text string) bool {
	return text != "" && len(text) <= nameBytesMax && policy.Printable(text, nameBytesMax) == text
}

// register records an instance once the controller has acknowledged it. The same registration again is acknowledged
// again; a container under another identity is refused.
func (a *Agent) register(i *instance) result {
	if !isName(i.container) || !isName(i.app) || !isName(i.function) || i.image == "" ||
		policy.Printable(i.image, imageBytesMax) != i.image {
		return refusal(codeBadRequest, "register takes container, app, function and image, printable and bounded")
	}
	known, refused := a.reserve(i)
	switch {
	case refused != nil && refused.Error == codeUnknownApp && a.link.current() == nil:
		// A controller may yet bring a policy, so the engine should ask again.
		return a.refused(i, refusal(string(policy.ReasonControllerUnavailable), "no connection to a controller"))
	case refused != nil:
		return a.refused(i, *refused)
	case known:
		return result{OK: true}
	}
	outcome := make(chan result, 1)
	// Acknowledged on the link's goroutine: were the connection lost in between, the next one would not register it.
	asked := a.link.ask(&question{m: i.frame(), max: questionsMax, again: true, done: func(answer *frame.Answer) { outcome <- a.registered(i, answer) }})
	if asked != "" {
		a.release(i)
		return a.refused(i, refusal(string(asked), "the controller cannot be asked"))
	}
	timer := time.NewTimer(registerTimeout)
	defer timer.Stop()
	select {
	case r := <-outcome:
		if !r.OK {
			return a.refused(i, r)
		}
		a.log.Info(eventInstanceAdded, keyInstance, i.container, keyApp, i.app, keyFunction, i.function)
		return r
	case <-timer.C:
		a.release(i) // an answer that comes now finds it gone, and says so to the controller
		return a.refused(i, refusal(string(policy.ReasonControllerUnavailable), "the controller did not acknowledge"))
	}
}

// registered takes the controller's answer to a registration; nil when there was none.
func (a *Agent) registered(i *instance, answer *frame.Answer) result {
	switch {
	case answer == nil:
		a.release(i)
		return refusal(string(policy.ReasonControllerUnavailable), "the controller did not acknowledge")
	case !answer.Allowed:
		a.release(i)
		return refusal(answer.Reason, answer.Detail)
	case !a.acknowledge(i):
		a.tellGone(i.container)
		return refusal(codeUnregistered, "the instance was unregistered while the controller was asked")
	}
	return result{OK: true}
}

func (a *Agent) refused(i *instance, r result) result {
	a.log.Warn(eventInstanceRefused, keyInstance, i.container, keyApp, i.app, keyFunction, i.function, keyReason, r.Error, keyError, r.Detail)
	return r
}

// reserve puts i into the table, not acknowledged yet. Otherwise it tells that i is there and acknowledged, or why it
// must not be.
func (a *Agent) reserve(i *instance) (known bool, refused *result) {
	a.mu.Lock()
	defer a.mu.Unlock()
	refuse := func(code, detail string) (bool, *result) {
		r := refusal(code, detail)
		return false, &r
	}
	held := a.policies[i.app]
	if held == nil {
		return refuse(codeUnknownApp, "no policy of app "+i.app+" is in force")
	}
	if held.policy.Functions[i.function] == nil {
		return refuse(string(policy.ReasonUnknownFunction), "the policy of app "+i.app+" has no function "+i.function)
	}
	if before := a.instances[i.container]; before != nil {
		if before.acknowledged && before.identity() == i.identity() && before.image == i.image {
			return true, nil
		}
		return refuse(codeInUse, "the container is registered under another identity, or its registration is under way")
	}
	if len(a.instances) == instancesMax {
		return refuse(codeTooMany, "the node has as many instances as it may have")
	}
	a.instances[i.container] = i
	return false, nil
}

// release takes a registration out again that was not acknowledged.
func (a *Agent) release(i *instance) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.instances[i.container] == i {
		a.drop(i)
	}
}

// drop needs mu.
func (a *Agent) drop(i *instance) {
	delete(a.instances, i.container)
	a.dismiss(i)
}

// dismiss takes its guard from an instance and ends it, and says whether there was one. It needs mu.
func (a *Agent) dismiss(i *instance) bool {
	g := i.guard
	if g == nil {
		return false
	}
	i.guard = nil
	go g.dismiss()
	return true
}

func (a *Agent) acknowledge(i *instance) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.instances[i.container] != i {
		return false
	}
	i.acknowledged = true
	a.tellWaiting()
	a.reports.soon()
	return true
}

// unregister forgets an instance and closes its guard's connection. One that is not known is gone already.
func (a *Agent) unregister(container string) {
	a.mu.Lock()
	i := a.instances[container]
	if i != nil {
		a.drop(i)
	}
	a.mu.Unlock()
	if i == nil {
		return
	}
	a.tellGone(container)
	a.reports.soon()
	a.log.Info(eventInstanceGone, keyInstance, container, keyApp, i.app, keyFunction, i.function)
}

// tellGone sends UNREGISTER. When there is no connection, a controller forgets the node's instances by itself and the next
// one is told only of those that are left.
func (a *Agent) tellGone(container string) {
	if err := a.link.tell(&frame.Unregister{Instance: container}); err != nil && !errors.Is(err, errAway) {
		a.log.Warn(eventInstanceGone, keyInstance, container, keyError, err)
	}
}

func (a *Agent) status() result {
	controllers := a.link.status()
	connected := slices.ContainsFunc(controllers, func(c controllerStatus) bool { return c.Connected })
	a.mu.Lock()
	defer a.mu.Unlock()
	versions := make(map[string]int, len(a.policies))
	for app, held := range a.policies {
		versions[app] = held.policy.Version
	}
	instances := []instanceStatus{}
	for _, i := range a.instances {
		if i.acknowledged {
			mode, version := i.effective()
			instances = append(instances, instanceStatus{Container: i.container, App: i.app, Function: i.function, Mode: mode, Version: version})
		}
	}
	slices.SortFunc(instances, func(a, b instanceStatus) int {
		return cmp.Or(cmp.Compare(a.App, b.App), cmp.Compare(a.Function, b.Function), cmp.Compare(a.Container, b.Container))
	})
	return result{OK: true, Controller: &connected, Controllers: &controllers, Policies: &versions, Instances: &instances}
}

// list names the registrations that the controller has acknowledged.
func (a *Agent) list() result {
	a.mu.Lock()
	defer a.mu.Unlock()
	containers := []string{}
	for name, i := range a.instances {
		if i.acknowledged {
			containers = append(containers, name)
		}
	}
	slices.Sort(containers)
	return result{OK: true, Containers: &containers}
}

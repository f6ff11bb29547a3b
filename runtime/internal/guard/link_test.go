package guard

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// agent is the other end of a link, driven by the test.
type agent struct {
	t      *testing.T
	conn   net.Conn
	reader frame.Reader
}

func linked(t *testing.T) (*Link, *agent, *Guard, chan string, *[]frame.VerdictRecord) {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { theirs.Close() })
	fallen := &[]frame.VerdictRecord{}
	l := NewLink(ours, 1, func(r *frame.VerdictRecord) { *fallen = append(*fallen, *r) })
	g, err := New(testIdentity, guardtest.PublicKey, guardtest.Welcome(t, "enforce"), l)
	if err != nil {
		t.Fatal(err)
	}
	reports := make(chan string, 10)
	l.Serve(&frame.Reader{}, g, func(why string) { reports <- why })
	a := &agent{t: t, conn: theirs}
	if id, m := a.next(); id != 0 || *m.(*frame.Mode) != (frame.Mode{Mode: "enforce", Version: 3}) {
		t.Fatalf("the first word is %+v", m)
	}
	return l, a, g, reports, fallen
}

func (a *agent) next() (uint32, frame.Message) {
	a.t.Helper()
	a.conn.SetReadDeadline(time.Now().Add(patience))
	buffer := make([]byte, 4096)
	for {
		id, m, err := a.reader.Next()
		if err == nil {
			return id, m
		}
		if err != frame.ErrShort {
			a.t.Fatal(err)
		}
		n, err := a.conn.Read(buffer)
		if err != nil {
			a.t.Fatal(err)
		}
		a.reader.Feed(buffer[:n])
	}
}

func (a *agent) say(id uint32, m frame.Message) {
	a.t.Helper()
	b, err := frame.Append(nil, id, m)
	if err != nil {
		a.t.Fatal(err)
	}
	if _, err := a.conn.Write(b); err != nil {
		a.t.Fatal(err)
	}
}

func soon() time.Time { return time.Now().Add(patience) }

func TestAnswersFindTheirQuestionsInAnyOrder(t *testing.T) {
	l, a, _, _, _ := linked(t)
	const count = 10
	answers := make(chan string, count)
	for i := range count {
		go func() {
			answer, err := l.Invoke(soon(), &frame.Invoke{Step: newStep(), Callee: fmt.Sprint(i)})
			if err != nil {
				answers <- err.Error()
				return
			}
			answers <- fmt.Sprint(i == int(answer.Token[0]-'0'), answer.Allowed)
		}()
	}
	ids := map[uint32]string{}
	for range count {
		id, m := a.next()
		ids[id] = m.(*frame.Invoke).Callee
	}
	if len(ids) != count || ids[0] != "" || ids[1] != "" {
		t.Fatalf("ids %v", ids)
	}

	for id, callee := range ids { // a map's order is none
		a.say(id, &frame.Answer{Allowed: true, Reason: "allowed", Token: callee})
	}

	for range count {
		if got := <-answers; got != "true true" {
			t.Error(got)
		}
	}
}

func TestAQuestionWaitsUntilItsDeadlineOnly(t *testing.T) {
	l, a, _, _, _ := linked(t)
	done := make(chan error, 1)
	go func() {
		_, err := l.Start(time.Now().Add(500*time.Millisecond), &frame.Start{Step: newStep()})
		done <- err
	}()
	id, _ := a.next()
	if err := <-done; !errors.Is(err, errNoAnswer) {
		t.Fatal(err)
	}

	// The grant that comes too late is ended, or the controller would hold the invocation.
	a.say(id, &frame.Answer{Allowed: true, Reason: "allowed", Call: guardtest.Call, Invocation: guardtest.Invocation})

	if _, m := a.next(); m.(*frame.End).Invocation != guardtest.Invocation || m.(*frame.End).Outcome != "closed" {
		t.Errorf("the agent heard %+v", m)
	}
}

func TestUpdatesReachTheGuard(t *testing.T) {
	_, a, g, reports, _ := linked(t)
	a.say(0, &frame.Policy{App: "shop", Policy: guardtest.Signed(t, "audit", "9")})
	a.say(0, &frame.Names{Names: map[string][]string{"gateway": {"10.137.0.7"}}})
	a.say(0, &frame.Policy{App: "shop", Policy: []byte("{}")})

	if why := <-reports; !strings.Contains(why, "the last good one stays") {
		t.Errorf("report %q", why)
	}
	if g.stand().policy.Version != 9 || g.addresses("gateway", false)[0].String() != "10.137.0.7" {
		t.Error("an update did not arrive")
	}
	a.say(0, &frame.Lease{LeaseMS: 0})
	deadline := soon()
	for g.stand().refusal != "lease_expired" {
		if time.Now().After(deadline) {
			t.Fatal("the lease did not end")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestAMessageThatIsNotForAGuardEndsTheLink(t *testing.T) {
	l, a, _, reports, _ := linked(t)

	a.say(7, &frame.Status{})

	if why := <-reports; !strings.Contains(why, "not for a guard") {
		t.Errorf("report %q", why)
	}
	if _, err := l.Start(soon(), &frame.Start{Step: newStep()}); !errors.Is(err, errLinkDown) {
		t.Errorf("asking afterwards: %v", err)
	}
}

func TestWhenTheAgentDiesQuestionsFailAndVerdictsFallBack(t *testing.T) {
	l, a, _, reports, fallen := linked(t)
	done := make(chan error, 1)
	go func() {
		_, err := l.Invoke(soon(), &frame.Invoke{Step: newStep()})
		done <- err
	}()
	a.next()

	a.conn.Close()

	if err := <-done; !errors.Is(err, errLinkDown) {
		t.Errorf("the open question: %v", err)
	}
	<-reports
	if err := l.Log(soon(), &frame.VerdictRecord{Event: frame.EventVerdict, Reason: "allowed"}); err != nil || len(*fallen) != 1 {
		t.Errorf("log: %v, %d verdicts fell back", err, len(*fallen))
	}
}

func TestAFullQueueDeniesInsteadOfDropping(t *testing.T) {
	ours, _ := net.Pipe() // nobody reads
	l := NewLink(ours, 1, nil)
	go l.write(func(string) {})
	record := &frame.VerdictRecord{Event: frame.EventVerdict, Reason: "allowed"}
	var err error
	for i := 0; err == nil; i++ {
		if i > queueMax+1 {
			t.Fatal("the queue has no end")
		}
		err = l.Log(time.Now().Add(10*time.Millisecond), record)
	}

	if !errors.Is(err, errQueueStuck) {
		t.Error(err)
	}
}

func TestQuestionsWithoutAnswerAreBounded(t *testing.T) {
	ours, _ := net.Pipe()
	l := NewLink(ours, 1, nil)
	for range pendingMax {
		if _, err := l.Start(time.Now(), &frame.Start{Step: newStep()}); !errors.Is(err, errNoAnswer) {
			t.Fatal(err)
		}
	}

	if _, err := l.Start(soon(), &frame.Start{Step: newStep()}); !errors.Is(err, errLinkFull) {
		t.Error(err)
	}
}

// The answer to an app edge comes by the same reader as a policy before it.
func TestAPolicyThatComesWhileAnAnswerIsWaitedForDelaysNothing(t *testing.T) {
	_, a, g, _, _ := linked(t)
	in := accept(t, g)
	admitted := make(chan Admission, 1)
	go func() { admitted <- in.Admit([]byte(postRequest), nil) }()
	id, _ := a.next()
	a.say(id, &frame.Answer{Allowed: true, Reason: "allowed", Call: guardtest.Call, Invocation: guardtest.Invocation})
	a.next() // the verdict
	released(t, <-admitted)
	g.live.cursor = atState(g, 2)
	out := connect(t, g, "10.137.0.1:8080")
	outcome := make(chan Outcome, 1)
	go func() {
		_, o := out.Write([]byte(request("POST /function/payer", "gateway:8080")))
		outcome <- o
	}()
	id, _ = a.next()

	a.say(0, &frame.Policy{App: "shop", Policy: guardtest.Signed(t, "enforce", "9")})
	a.say(id, &frame.Answer{Allowed: true, Reason: "allowed", Token: guardtest.Token})

	if got := <-outcome; got != Allowed {
		t.Errorf("outcome %d", got)
	}
}

// dismissal is a connection that cannot be written any more, with a last word that is read a little later.
type dismissal struct {
	word   []byte
	closed chan struct{}
}

func (d *dismissal) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func (d *dismissal) Read(b []byte) (int, error) {
	select {
	case <-d.closed:
		return 0, io.ErrClosedPipe
	case <-time.After(20 * time.Millisecond):
	}
	n := copy(b, d.word)
	d.word = d.word[n:]
	return n, nil
}

func (d *dismissal) Close() error {
	close(d.closed)
	return nil
}

// Else a guard that writes when it is dismissed would take the agent for gone, which a fail mode may forgive.
func TestAGuardThatIsDismissedHearsTheEndOfItsLease(t *testing.T) {
	word, err := frame.Append(nil, 0, &frame.Lease{})
	if err != nil {
		t.Fatal(err)
	}
	d := &dismissal{word: word, closed: make(chan struct{})}
	l := NewLink(d, 1, func(*frame.VerdictRecord) {})
	g, err := New(testIdentity, guardtest.PublicKey, guardtest.Welcome(t, "enforce"), l)
	if err != nil {
		t.Fatal(err)
	}

	l.Serve(&frame.Reader{}, g, func(string) {}) // and the guard says its mode

	<-l.down
	if g.leased() {
		t.Error("the link is down, and the lease goes on")
	}
}

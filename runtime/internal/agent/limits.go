package agent

import (
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// Bounds of the daemon. What happens at each is said where it is used; always it is a refusal, never a queue that grows.
const (
	configBytesMax   = 64 * 1024
	rootsBytesMax    = 512 * 1024 // of trust roots: they fit a frame beside a policy of half a frame
	versionsBytesMax = 1 << 20
	appsMax          = 256 // apps with a policy
	controllersMax   = 8
	auditMiBMax      = 64 * 1024 // of the audit log, before it is rotated

	instancesMax      = 1024 // registrations of the node
	guardsMax         = 1200 // connections on the guard socket; one an instance, and room for those before their hello
	waitingMax        = 128  // hellos that wait for their registration; a node of Kubernetes has 110 pods
	guardQuestionsMax = 64   // open questions of one guard
	stepQuestionsMax  = 3072 // open questions of all guards
	questionsMax      = 4096 // and of registrations; the controller closes a connection with more
	guardPendingMax   = 4 << 20
	linkPendingMax    = 8 << 20
	registerConnsMax  = 32
	registerLineMax   = 4096
	readBytes         = 16 * 1024 // one read from a guard
	linkReadBytes     = 64 * 1024
	linkWriteBytes    = 64 * 1024 // of what has waited for a connection, with one write
	nameBytesMax      = 253       // of an app, a function, a container
	imageBytesMax     = 512
	sourcesMax        = 16
	addressesMax      = 16 // of one name
	lookupsAtOnce     = 8
	denialsPerSecond  = 100                // of an instance, that are logged
	denialBurst       = 1000               // at once
	denialSourcesMax  = 2*instancesMax + 1 // instances that are remembered; a node that replaces all of them has twice as many
	verdictBatchBytes = 64 * 1024
	verdictPendingMax = 1 << 20
	timingsWaitingMax = 256      // frames of samples that wait to be written
	timingsBytesMax   = 64 << 20 // of the timing log, and of the one before it
	logTextMax        = 200
	leaseMSMax        = 10 * 60 * 1000
	admitWaitMSMax    = 30 * 1000 // the runtime waits for 5 s more
	endsMax           = 4096      // ENDs that wait for the next connection, and those that the present one may not have read
	countersMax       = 512       // of one kind, before apps are counted together
	inlineWritesMax   = 4         // of one goroutine for others; then another one goes on
	sayAwayEvery      = 5         // rounds of attempts between two lines about controllers that cannot be reached
	redialsMax        = 30        // in the time of redialEvery, when a certificate has seconds left
	acceptPause       = 100 * time.Millisecond

	helloTimeout        = 5 * time.Second
	guardWriteTimeout   = 5 * time.Second
	registerTimeout     = 5 * time.Second // until the controller acknowledges
	registerIdle        = 10 * time.Minute
	attemptPatient      = 5 * time.Second // TCP, TLS and welcome
	attemptBrief        = time.Second     // the same, while another controller has not been tried
	guardDismissTimeout = time.Second     // for the last word to a guard
	linkWriteTimeout    = 5 * time.Second
	linkFinishTimeout   = time.Second            // for what was sent before the agent ends a connection itself
	pingAfter           = 250 * time.Millisecond // of silence
	silenceAmongOthers  = 750 * time.Millisecond // until a controller is given up for the next one
	silenceAlone        = 5 * time.Second        // and when there is no other one
	parkMax             = time.Second            // of a question between two connections
	stableAfter         = time.Second            // a connection that ends sooner counts as a failure to connect
	answerTimeout       = 10 * time.Second       // a controller that leaves a question open for longer is taken for dead
	redialBefore        = 10 * time.Minute       // a certificate expires: a third of a week is left when it is renewed
	redialEvery         = time.Minute
	backoffMin          = 50 * time.Millisecond
	backoffMax          = 2 * time.Second        // while no controller can be reached
	backoffLost         = 250 * time.Millisecond // while connections do not last; what is parked must not wait for longer
	reportEvery         = 5 * time.Second
	reportPause         = 200 * time.Millisecond // between two reports
	guardEndWait        = 2 * time.Second        // of a guard for the end of the one before it; the runtime waits for 5 s
	suppressedEvery     = time.Second
	verdictDelay        = 20 * time.Millisecond
	verdictRetry        = time.Second
	verdictWaitMax      = 5 * time.Second // of a guard whose verdict does not fit the batch
	lookupTimeout       = 2 * time.Second
	lookupEvery         = 30 * time.Second
	lookupKeep          = 5 * time.Minute // an answer outlives failing lookups for so long
	statusTimeout       = 5 * time.Second
	registerWriteLimit  = 5 * time.Second
)

// Relations between the bounds; a negative length does not compile.
var (
	_ [stepQuestionsMax - guardQuestionsMax]struct{}
	_ [questionsMax - stepQuestionsMax - instancesMax]struct{} // every instance can be registered again at once
	_ [guardsMax - instancesMax - waitingMax]struct{}
	_ [guardPendingMax - 2*frame.FrameBytesMax - 2*frame.HeaderBytes]struct{} // the largest frame may follow another
	_ [linkPendingMax - 2*frame.FrameBytesMax]struct{}
	_ [parkMax - backoffLost]struct{}
	_ [time.Second - silenceAmongOthers - pingAfter/2]struct{} // a silent controller is replaced within a second
	_ [silenceAmongOthers - 2*pingAfter]struct{}               // a lost answer to one ping is not yet silence
)

package agent

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notifySystem tells systemd, where it started the agent, that the agent serves, that it is well, and that it ends. Being
// well is that nobody keeps a table locked; a controller that is away is no reason for a restart.
func (a *Agent) notifySystem(ctx context.Context) {
	a.notify(daemon.SdNotifyReady)
	defer a.notify(daemon.SdNotifyStopping)
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		a.log.Warn(eventSystemUntold, keyError, err)
	}
	if err != nil || every <= 0 {
		<-ctx.Done()
		return
	}
	ticker := time.NewTicker(every / 2)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		a.status() // goes through every lock: who waits in it for too long is restarted
		a.notify(daemon.SdNotifyWatchdog)
	}
}

// notify says nothing when nobody listens.
func (a *Agent) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		a.log.Warn(eventSystemUntold, keyError, err)
	}
}

// Package agent is the daemon of a node: it stands between the guards in the sandboxes and the controller.
//
// It knows which instance runs which function from the engine, over a socket that only root can use, and adds that
// identity to every question of a guard; what a guard says about itself is compared and never believed. It verifies
// policies, keeps the highest version that it has seen, writes the verdict log, and answers at once when the controller
// is away. It decides nothing that a policy or the controller decides.
//
// Whenever it cannot do its work it denies: it refuses the hello, answers a question with no, or closes a guard's
// connection, and a guard without a connection denies everything.
package agent

// Commands as Kubeflow's launcher starts them, by its own code: every placeholder replaced, and one step run to its end,
// with its outputs collected.  tests/kubeflow/render.sh copies this file into a checkout and runs it there.
package component

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/kubeflow/pipelines/api/v2alpha1/go/pipelinespec"
	"github.com/kubeflow/pipelines/backend/src/v2/metadata"
	"github.com/kubeflow/pipelines/backend/src/v2/objectstore"
	"github.com/stretchr/testify/require"
	"gocloud.dev/blob"
	_ "gocloud.dev/blob/memblob"
	"google.golang.org/protobuf/encoding/protojson"
	"k8s.io/client-go/kubernetes/fake"
)

type launch struct {
	Input     json.RawMessage `json:"executor_input"`
	Component json.RawMessage `json:"component"`
	Command   []string        `json:"command"`
}

// launches of all steps, by name, as written by the driver (render_test.go).
func launches(t *testing.T) map[string]launch {
	found := map[string]launch{}
	text, err := os.ReadFile(os.Getenv("VGG_LAUNCHES"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &found))
	return found
}

func executorInputOf(t *testing.T, step launch) *pipelinespec.ExecutorInput {
	input := &pipelinespec.ExecutorInput{}
	require.NoError(t, protojson.Unmarshal(step.Input, input))
	return input
}

func TestCommandsVGG(t *testing.T) {
	commands := map[string]map[string]any{}
	for name, step := range launches(t) {
		program, arguments, err := compileCmdAndArgs(executorInputOf(t, step), step.Command[0], step.Command[1:])
		require.NoError(t, err)
		for _, word := range append([]string{program}, arguments...) {
			require.NotContains(t, word, "{{", "%s: the launcher leaves a placeholder", name)
		}
		commands[name] = map[string]any{"executor_input": step.Input, "command": append([]string{program}, arguments...)}
	}
	out, err := json.Marshal(commands)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(os.Getenv("VGG_COMMANDS"), out, 0o644))
}

// TestStepVGG runs sharding: the output that it reports must be collected.
func TestStepVGG(t *testing.T) {
	output, err := run(t, launches(t)["shard"])
	require.NoError(t, err)
	shards := output.GetParameterValues()["shards"].GetStringValue()
	require.True(t, strings.HasPrefix(shards, "store:shards/") && strings.HasSuffix(shards, ".dir"), shards)
	require.Equal(t, 1, len(output.GetArtifacts()["metrics"].GetArtifacts()))
}

// TestRefusalVGG shows how the launcher reports an exit code: only in the text of an error; the pod's own code is always 1.
func TestRefusalVGG(t *testing.T) {
	step := launches(t)["shard"]
	for i, word := range step.Command {
		if word == "--params" {
			step.Command[i+1] = "{}"
		}
	}
	_, err := run(t, step)
	require.EqualError(t, err, "exit status 64")
}

func run(t *testing.T, step launch) (*pipelinespec.ExecutorOutput, error) {
	component := &pipelinespec.ComponentSpec{}
	require.NoError(t, protojson.Unmarshal(step.Component, component))
	bucket, err := blob.OpenBucket(context.Background(), "mem://mlpipeline")
	require.NoError(t, err)
	config, err := objectstore.ParseBucketConfig("s3://mlpipeline/v2/artifacts/", nil)
	require.NoError(t, err)
	output, _, err := executeV2(context.Background(), executorInputOf(t, step), component, step.Command[0], step.Command[1:],
		bucket, config, metadata.NewFakeClient(), "kubeflow", &fake.Clientset{}, "false", "", nil)
	return output, err
}

// The package processed by Kubeflow Pipelines' own code: validated and compiled as by its API server, and every step's pod
// as patched by its driver.  tests/kubeflow/render.sh copies this file into a checkout and runs it there, because the
// driver's functions are private.
package driver

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	wfapi "github.com/argoproj/argo-workflows/v4/pkg/apis/workflow/v1alpha1"
	"github.com/kubeflow/pipelines/api/v2alpha1/go/pipelinespec"
	"github.com/kubeflow/pipelines/backend/src/apiserver/config/proxy"
	"github.com/kubeflow/pipelines/backend/src/apiserver/model"
	"github.com/kubeflow/pipelines/backend/src/apiserver/template"
	"github.com/kubeflow/pipelines/backend/src/common/util"
	"github.com/kubeflow/pipelines/kubernetes_platform/go/kubernetesplatform"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	goyaml "gopkg.in/yaml.v3"
	k8score "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
)

func TestRenderVGG(t *testing.T) {
	proxy.InitializeConfigWithEmptyForTests()
	util.SetExecutionType(util.ArgoWorkflow)
	text := read(t, "VGG_PACKAGE")
	arguments := read(t, "VGG_ARGUMENTS")

	accepted, err := template.New(text, template.TemplateOptions{})
	require.NoError(t, err)
	run := &model.Run{UUID: "u", DisplayName: "vgg", Namespace: "kubeflow", ServiceAccount: "pipeline-runner"}
	run.RuntimeConfig = model.RuntimeConfig{Parameters: model.LargeText(arguments)}
	compiled, err := accepted.RunWorkflow(run, template.RunWorkflowOptions{RunID: "run-1", RunAt: 1})
	require.NoError(t, err)
	require.NoError(t, compiled.Validate(false, true)) // Argo's
	workflow := compiled.(*util.Workflow)

	spec, platform, deployment := &pipelinespec.PipelineSpec{}, &pipelinespec.PlatformSpec{}, &pipelinespec.PipelineDeploymentConfig{}
	decoder := goyaml.NewDecoder(strings.NewReader(string(text)))
	for _, message := range []proto.Message{spec, platform} {
		var document map[string]any
		require.NoError(t, decoder.Decode(&document))
		convert(t, document, message)
	}
	convert(t, spec.GetDeploymentSpec().AsMap(), deployment)

	pods, launches := map[string]json.RawMessage{}, map[string]map[string]any{}
	for name, component := range spec.GetComponents() {
		if label := component.GetExecutorLabel(); label != "" {
			inputs := values(t, spec, component, arguments)
			config := &kubernetesplatform.KubernetesExecutorConfig{}
			settings, err := protojson.Marshal(platform.GetPlatforms()["kubernetes"].GetDeploymentSpec().GetExecutors()[label])
			require.NoError(t, err)
			require.NoError(t, protojson.Unmarshal(settings, config))
			input := executorInput(strings.TrimPrefix(name, "comp-"), component, inputs)
			patch, err := initPodSpecPatch(deployment.GetExecutors()[label].GetContainer(), component, input, 1, "vgg-imagenet", "run-1", "vgg", "1", "false", "false", nil, false, false, "",
				"ml-pipeline.kubeflow", "8887", "metadata-grpc-service.kubeflow", "8080", map[string]string{})
			require.NoError(t, err, name)
			options := Options{KubernetesExecutorConfig: config, Component: component}
			require.NoError(t, extendPodSpecPatch(context.Background(), patch, options, nil, nil, nil, inputs, nil), name)
			pods[strings.TrimPrefix(name, "comp-")] = merged(t, workflow.Workflow, patch)
			own := map[string]*structpb.Value{}
			for input := range component.GetInputDefinitions().GetParameters() {
				own[input] = inputs[input]
			}
			input = executorInput(strings.TrimPrefix(name, "comp-"), component, own)
			launches[strings.TrimPrefix(name, "comp-")] = map[string]any{
				"executor_input": message(t, input), "component": message(t, component), "command": patch.Containers[0].Args,
			}
		}
	}
	for variable, found := range map[string]any{"VGG_PODS": pods, "VGG_LAUNCHES": launches} {
		out, err := json.Marshal(found)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(os.Getenv(variable), out, 0o644))
	}
}

// executorInput is the driver's input for the launcher: values, and locations of outputs.
func executorInput(task string, component *pipelinespec.ComponentSpec, values map[string]*structpb.Value) *pipelinespec.ExecutorInput {
	root := "s3://mlpipeline/v2/artifacts"
	inputs := &pipelinespec.ExecutorInput_Inputs{ParameterValues: values, Artifacts: map[string]*pipelinespec.ArtifactList{}}
	for name, definition := range component.GetInputDefinitions().GetArtifacts() {
		artifact := &pipelinespec.RuntimeArtifact{Name: name, Uri: root + "/before/" + name, Type: definition.GetArtifactType()}
		inputs.Artifacts[name] = &pipelinespec.ArtifactList{Artifacts: []*pipelinespec.RuntimeArtifact{artifact}}
	}
	outputs := provisionOutputs(root, task, component.GetOutputDefinitions(), "salt", "false")
	return &pipelinespec.ExecutorInput{Inputs: inputs, Outputs: outputs}
}

// values of a component's inputs: run arguments, a stage's section for its params, else the string "given".
func values(t *testing.T, spec *pipelinespec.PipelineSpec, component *pipelinespec.ComponentSpec, arguments []byte) map[string]*structpb.Value {
	given, found := map[string]any{}, map[string]*structpb.Value{}
	require.NoError(t, json.Unmarshal(arguments, &given))
	for input := range component.GetInputDefinitions().GetParameters() {
		found[input] = structpb.NewStringValue("given")
	}
	sections := map[string]string{"exec-gate": "register"}
	section := sections[component.GetExecutorLabel()]
	if section == "" {
		section = strings.TrimPrefix(component.GetExecutorLabel(), "exec-")
	}
	if _, exists := found["params"]; exists {
		value, err := structpb.NewValue(given[section])
		require.NoError(t, err)
		found["params"] = value
	}
	for name, definition := range spec.GetRoot().GetInputDefinitions().GetParameters() {
		value := definition.GetDefaultValue()
		if argument, exists := given[name]; exists {
			var err error
			value, err = structpb.NewValue(argument)
			require.NoError(t, err)
		}
		if value != nil {
			found[name], found["pipelinechannel--"+name] = value, value
		}
	}
	return found
}

// merged is the pod that Argo starts: the template of the workflow with the driver's patch applied.
func merged(t *testing.T, workflow *wfapi.Workflow, patch *k8score.PodSpec) json.RawMessage {
	for _, candidate := range workflow.Spec.Templates {
		if !strings.HasSuffix(candidate.Name, "system-container-impl") {
			continue
		}
		base := k8score.PodSpec{Containers: []k8score.Container{*candidate.Container}, Volumes: candidate.Volumes, SecurityContext: workflow.Spec.SecurityContext}
		base.Containers[0].Name = "main"
		if candidate.SecurityContext != nil {
			base.SecurityContext = candidate.SecurityContext
		}
		for _, container := range candidate.InitContainers {
			base.InitContainers = append(base.InitContainers, container.Container)
		}
		original, err := json.Marshal(base)
		require.NoError(t, err)
		change, err := json.Marshal(patch)
		require.NoError(t, err)
		pod, err := strategicpatch.StrategicMergePatch(original, change, k8score.PodSpec{})
		require.NoError(t, err)
		return pod
	}
	t.Fatal("the workflow has no template for steps")
	return nil
}

func message(t *testing.T, from proto.Message) json.RawMessage {
	text, err := protojson.Marshal(from)
	require.NoError(t, err)
	return text
}

func convert(t *testing.T, from any, to proto.Message) {
	text, err := json.Marshal(from)
	require.NoError(t, err)
	require.NoError(t, protojson.Unmarshal(text, to))
}

func read(t *testing.T, variable string) []byte {
	text, err := os.ReadFile(os.Getenv(variable))
	require.NoError(t, err)
	return text
}
